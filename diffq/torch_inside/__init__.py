"""What depends on the inside of torch: sharding by FSDP2, and cheap autograd functions."""
