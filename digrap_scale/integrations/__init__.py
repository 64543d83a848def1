"""Other people's loops: small callbacks for frameworks that keep their optimizer to themselves (docs/integrations.md).

Each module imports its framework, so none is imported here.
"""
