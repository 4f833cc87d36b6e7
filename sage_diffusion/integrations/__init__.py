"""Hosts: each folder translates one host's calls into an ``AttentionSession`` and undoes itself."""
