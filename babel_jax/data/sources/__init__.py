"""Where text comes from: files, pages, the hub, the embedded corpus; rows with a language each."""
