"""Lightning callbacks that check a loss's gradient while it trains."""
