"""What is used, not read: pictures of results, tables, pages, the command line, faster CPUs."""
