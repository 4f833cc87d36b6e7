"""Hosts: each module translates one host's calls into an ``AttentionSession`` and undoes itself."""
