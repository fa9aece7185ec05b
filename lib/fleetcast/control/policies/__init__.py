"""Rules that scale: what a learned policy is compared with. None of them knows Ray."""
