"""What may happen to files: processes that are killed, disks that are full, bytes that change."""
