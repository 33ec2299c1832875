"""Side-by-side measurements: each script prints ratios, keeps raw JSON, and can check itself against its bar."""
