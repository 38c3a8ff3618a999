"""One class per gRPC service: parse, call one use case, format."""
