"""Pure tensor functions: no state, no trainer, torch only. Shapes are (rows, time) unless a docstring says otherwise."""
