"""What is measured: cases, masks, dense peers, rivals, engines, and the rows they give."""
