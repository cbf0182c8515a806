"""Several hosts that run one program: who they are, what they say to each other, and its end."""
