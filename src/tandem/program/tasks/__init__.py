"""Tasks that come with the package, for `task.environment`: each an Environment, written as a user would."""
