"""What every Triton operation shares: configurations, launches, compilation ahead of time."""
