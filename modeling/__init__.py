"""Modules and model families with configurable KV heads."""
