"""Private names of torch, and what depends on how torch works inside."""
