"""Builds a distillation corpus from packages: fetched, read, cleaned, split and tokenised, with an account of it."""
