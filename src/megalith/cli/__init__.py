"""Floor 9: the verbs of the `megalith` command, one file a verb."""
