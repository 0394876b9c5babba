// Formulas are broken into lines that fit the page: when its width changes (a phone is turned), set them anew.
(() => {
  const MEASURE = 110; // the state of a formula in MathJax before its place is measured
  let width = innerWidth, timer;
  addEventListener('resize', () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      if (Math.abs(innerWidth - width) < 40 || !window.MathJax?.startup?.promise) return;
      width = innerWidth;
      await MathJax.startup.promise;
      MathJax.startup.document.rerender(MEASURE);
    }, 250);
  });
})();
