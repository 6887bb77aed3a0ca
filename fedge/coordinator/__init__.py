"""The coordinator: compiles tasks, runs rounds, aggregates updates and publishes versions."""
