"""Published systems as runnable claims: set-up, mechanism on and off, curves, gates, verdict. One module each."""
