"""Floor 6: the step loop on real tokens. Runners, paged KV storage, sampling, grammar, the engine itself."""
