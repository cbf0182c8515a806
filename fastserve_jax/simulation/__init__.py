"""Everything of `fastserve simulate` around the scheduler: requests in, rows and pictures out."""
