"""What a corpus looks like, to a person: before anything long is started, and after `prepare`."""
