"""Published benchmarks: from their official annotation files to webdataset shards, one file a format."""
