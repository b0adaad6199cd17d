"""Text and chats for training: sources, the held-out split, tokens on disk, mixtures, and packed windows."""
