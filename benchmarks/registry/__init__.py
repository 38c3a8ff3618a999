"""The registry at the size of a company: what it costs to find something, beside a peer in the same run."""
