"""One file a verb: read artifacts, call the rooms, write the next artifact, say what was done."""
