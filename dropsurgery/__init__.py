"""Surgery on existing networks: match patterns, insert regularizers, strip them again."""
