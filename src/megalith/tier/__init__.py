"""Floor 3: where bytes live. Blocks, pools with hard caps, one mover, direct I/O, link throttles, and the store."""
