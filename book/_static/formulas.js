// Formulas are broken into lines that fit the page: when its width changes (a phone is turned) or a fold opens, set them
// anew.
(() => {
  const MEASURE = 110; // the state of a formula in MathJax before its place is measured
  let width = innerWidth, timer;
  addEventListener('resize', () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      if (Math.abs(innerWidth - width) < 40 || !window.MathJax?.startup?.promise) return;
      width = innerWidth;
      await MathJax.startup.promise;
      MathJax.startup.document.rerenderPromise(MEASURE);
    }, 250);
  });
  // a fold that a browser did not lay out while it was closed had no width to measure
  document.addEventListener('toggle', event => {
    const hidden = m => m.metrics.containerWidth === 1e6 && event.target.contains(m.start.node);
    if (event.target.open && window.MathJax?.startup?.document && [...MathJax.startup.document.math].some(hidden)) {
      MathJax.startup.promise.then(() => MathJax.startup.document.rerenderPromise(MEASURE));
    }
  }, true);
})();
