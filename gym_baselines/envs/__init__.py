"""Making, checking, seeding and stepping environments; their spaces."""
