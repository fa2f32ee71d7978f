"""Memory guard: probe, policy, watcher, coordinator, emergency checkpoint."""
