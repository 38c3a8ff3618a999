"""The servers of the suite: one package a service, and what they share."""
