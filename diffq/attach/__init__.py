"""What sits on a model: plans, weight quantizers, forwards, attaching and detaching."""
