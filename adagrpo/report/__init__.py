"""The report page of runs; reads run folders, knows nothing else of them."""
