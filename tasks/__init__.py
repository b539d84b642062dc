"""The stages of a release as Prefect tasks: each logs, calls the core once, shows one artifact and returns a record."""
