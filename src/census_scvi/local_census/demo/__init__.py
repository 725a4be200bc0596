"""The demo Census: simulated cells of human and mouse."""
