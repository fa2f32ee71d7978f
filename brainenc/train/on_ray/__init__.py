"""All that training knows of Ray: which cluster, how many workers on it, and what runs in each of them."""
