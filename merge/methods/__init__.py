"""Mathematics of each adapter method, one file per method; independent of any layout on disk."""
