"""Every private name of torch that the package needs, each with its reason."""
