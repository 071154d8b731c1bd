"""The paper's Tables 1-6, from records: layouts, cells, comparisons, and the files written from them."""
