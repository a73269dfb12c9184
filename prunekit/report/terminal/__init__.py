"""What a verb prints for people, where it is more than a few lines, and the tables that it prints them in.

A verb names what prints its result as it calls ``Output.show``; a few lines stand in its own file (``prunekit/cli``).
"""
