"""Completions -> scores, from functions and from models."""
