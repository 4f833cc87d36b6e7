"""One attention call: what is asked, who computes it, the session that decides, the guard."""
