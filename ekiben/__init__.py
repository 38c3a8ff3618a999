"""Ekiben: the public client, the command line and the generated code of its APIs."""
