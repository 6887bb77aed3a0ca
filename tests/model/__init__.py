"""Models: claims about every order of events, and machines that look for one that breaks them."""
