"""fastqcow in other people's tools. Each module here is used alone, and only by who imports it: it may need a package of others."""
