/* Requests to the model while somebody types: only the last one counts. */

const PAUSE = 150; // milliseconds without a letter, after which the model is asked

/** Return a function that runs `work(signal)` after a pause; a later call ends an earlier one, whose errors nobody sees. */
export function latest(work, { onDone, onError }) {
  let controller = new AbortController();
  return (pause = PAUSE) => {
    controller.abort();
    controller = new AbortController();
    const { signal } = controller;
    const run = async () => {
      if (signal.aborted) return;
      try {
        const show = await work(signal);
        if (signal.aborted) return;
        show();
        onDone();
      } catch (error) {
        if (!signal.aborted) onError(error);
      }
    };
    setTimeout(run, pause);
  };
}
