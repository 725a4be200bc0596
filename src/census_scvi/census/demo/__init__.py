"""The demo Census: made-up cells of human and mouse."""
