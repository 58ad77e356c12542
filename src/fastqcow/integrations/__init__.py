"""fastqcow in other people's tools: a module for each, imported by its own name, as it may need a package of others."""
