"""One instance over several processes: ranks, their links and collectives, shards and windows of the weights."""
