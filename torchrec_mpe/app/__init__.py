"""What stands on the library: logs, models, training, reports, jobs and the command line."""
