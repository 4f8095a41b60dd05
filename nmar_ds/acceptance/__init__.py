"""Checks that users run on their own nodes: preflight's judgement and the self-test."""
